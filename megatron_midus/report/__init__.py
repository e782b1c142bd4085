"""How figures are shown: the page, its charts, tables for a page, Markdown and the terminal, and what the machine is."""
