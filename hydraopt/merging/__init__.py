"""The merge: families of factors, one byte budget, one verb."""
