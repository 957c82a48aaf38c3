"""What only a real GPU shows. These tests run by themselves, with `make test-gpu`, and need one that torch knows."""
