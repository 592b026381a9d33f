"""The HTTP API (extra `serve`): reads the database, never writes to it."""
