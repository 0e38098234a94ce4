"""The demonstration behind `make demo`: distil, index and search on text that every machine has."""
