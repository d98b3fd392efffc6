"""Give every layer a form and rewire what its branches read. These passes change the numbers, unless the form is exact."""
