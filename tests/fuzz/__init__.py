"""A seeded fuzzer of everything that is read: `make fuzz`."""
