"""What a bundle is made of, and who vouches for it: provenance, bill of materials, and their verification."""
