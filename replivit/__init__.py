"""The command `replivit`."""
