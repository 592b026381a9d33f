"""hlcli keeps a PostgreSQL database filled with Hyperliquid's public data."""

__version__ = "0.1.0"
