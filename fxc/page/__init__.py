"""report.html: what a compilation did, for people."""
