"""What a conversion does to every tensor, decided before a byte is written: rules, layers, names, completeness."""
