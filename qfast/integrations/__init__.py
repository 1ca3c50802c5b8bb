"""Integrations with other projects. Each is imported only when it is used."""
