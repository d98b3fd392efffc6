"""How ranks add up what they computed: one seam, `Communicator`, and its kinds."""
