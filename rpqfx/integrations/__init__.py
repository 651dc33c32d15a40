"""Other libraries' own calls, for rewritten models; each part is imported when it is used."""
