"""The commands of ``rpqfx``, each of which is thin over the library."""
