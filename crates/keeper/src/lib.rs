//! The keeper: the small long-lived process that sandboxes depend on.
