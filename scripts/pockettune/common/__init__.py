"""What every program stands on: starting and logging, writing whole files, errors, checksums."""
