"""The operators that lane programs are made of: our own, and sets of torch's that the compiler asks for."""
