//! The front door: the native HTTP API and the vendors' service APIs.
