"""Start collectives early, await them late, and check that compute lies in between."""
