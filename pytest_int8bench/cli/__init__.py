"""The ``int8bench`` command, one file per subcommand."""
