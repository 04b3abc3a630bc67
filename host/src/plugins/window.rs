//! The window: ring and worker part in sealed memfds, mapped into guest memory. The only unsafe memory code of the host.
