"""Faces for other people's tools. Each module needs the tool that it is named after; none is imported here."""
