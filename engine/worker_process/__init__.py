"""What both kinds of worker process share: the loaded engine, its routers, its metrics."""
