//! Runtime protocols: how a function's process receives requests and answers.
