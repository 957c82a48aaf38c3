"""What may go wrong around the library, one file for each kind of fault."""
