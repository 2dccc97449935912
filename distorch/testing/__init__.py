"""What tests and benchmarks of distorch stand on. Never imported by distorch itself."""
