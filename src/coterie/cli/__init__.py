"""The command line: one file per verb. A verb parses, calls one function of `coterie.api`, shows the result."""
