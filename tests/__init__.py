"""Tests of the compiler. A package, so that helper processes can import what the tests import."""
