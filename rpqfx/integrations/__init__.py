"""What makes other libraries' own calls work with rewritten models; each is imported when it is used."""
