"""Reports as an HTML page or Markdown, built from saved files."""
