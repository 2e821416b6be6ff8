"""Validated configuration: plug-ins and their options, sections of a study file, plain YAML."""
