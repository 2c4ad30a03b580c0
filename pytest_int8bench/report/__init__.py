"""What people read: the table of a session."""
