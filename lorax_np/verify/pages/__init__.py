"""A report as HTML, Markdown, JUnit: what every form of it shares, and each form.  Format: specs/reports.md."""
