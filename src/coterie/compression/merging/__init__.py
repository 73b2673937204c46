"""Methods that put the knowledge of several experts into fewer: one system per file, on the shared floor `segments`."""
