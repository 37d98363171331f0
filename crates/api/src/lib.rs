//! The front door: the native HTTP API and the vendors' service APIs.
//!
//! Each dialect is a module that turns requests into calls of the controller and its answers into
//! the dialect's own shapes. Nothing here knows what a sandbox's state means or which node it is
//! on.

#![forbid(unsafe_code)]

mod error;
mod native;

use std::io;

use axum::Router;
use axum::serve::ListenerExt;
use medes_controller::Controller;
use medes_node::NodeApi;
use tokio::net::TcpListener;

pub use error::ApiError;

/// All routes.
pub fn router<N: NodeApi>(controller: Controller<N>) -> Router {
    native::routes().with_state(controller).fallback(native::no_such_route)
}

/// Serves the API until `stop` has returned; requests under way are answered first.
///
/// # Errors
/// When the listener fails.
pub async fn serve<N: NodeApi>(
    listener: TcpListener,
    controller: Controller<N>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Head and body of an answer may go out in two packets; without this the second one waits up
    // to 40 ms for the first one's acknowledgement.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "setting TCP_NODELAY");
        }
    });
    axum::serve(listener, router(controller)).with_graceful_shutdown(stop).await
}
