"""The `mlsys` command: one file a subcommand, found through the table in main.py."""
