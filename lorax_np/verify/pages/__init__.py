"""A report as text, HTML, Markdown, JUnit: what all forms share, and each form.  Format: specs/reports.md."""
