"""What a user can run: measurements, the reference model, and the parts behind `./run`."""
