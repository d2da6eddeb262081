"""What a canonical class is, how a server's classes are probed, kept and tried out. No SGLang here: it is handed in."""
