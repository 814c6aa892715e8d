"""Model folders and adapters: checked, loaded, copied."""
