"""What the programs of PocketTune share."""
