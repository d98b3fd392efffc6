"""Give every layer a form and rewire what its branches read; the numbers change, unless the form is exact."""
