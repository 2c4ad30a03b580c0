"""Graph passes that fuse operators around INT8 layers, attention and image resizing."""
