"""Written once for all operations: backend choice, checks, registration with torch.library, the native library."""
