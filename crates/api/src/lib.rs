//! The front door: the native HTTP API and the vendors' service APIs.
//!
//! [`router`] answers requests by means of a [`Controller`]; [`serve`] does so on a socket until
//! the platform is shut down. The native API lies below `/v1`; below `/2015-03-31` lies as much of
//! AWS Lambda's as unmodified clients need to deploy and invoke. A vendor's dialect knows the
//! controller, never the other way round.
//!
//! There is no authentication: the API belongs on a loopback address. Web pages in a browser on
//! the same machine can reach that too, so requests that come from a foreign page are refused.

#![forbid(unsafe_code)]

mod attached;
mod body;
mod error;
mod lambda;
mod native;
mod origin;
mod policy;

use std::time::Duration;

use axum::Router;
use axum::http::{Method, Uri};
use axum::response::Response;
use axum::serve::ListenerExt;
use medes_attach::Client;
use medes_controller::Controller;
use medes_node::NodeApi;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

pub use error::ApiError;

/// How long connections may linger once nothing is left to be answered.
const LINGER: Duration = Duration::from_secs(2);

/// Everything that the front door answers. With `attach`, clients may have any process of the host
/// deduplicated.
pub fn router<N: NodeApi>(controller: Controller<N>, attach: Option<Client>) -> Router {
    Router::new()
        .merge(attached::routes(attach))
        .merge(native::routes().with_state(controller.clone()))
        .merge(lambda::routes(controller))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(axum::middleware::from_fn(origin::refuse_foreign_pages))
}

async fn unknown(method: Method, uri: Uri) -> Response {
    if lambda::is_lambda_path(uri.path()) {
        lambda::unknown_operation(&method, uri.path())
    } else {
        native::no_such_route(&method, uri.path())
    }
}

/// Serves the front door on `listener` until `shutdown` completes or a client asks for the end.
/// Then no connection is accepted any more, requests under way are answered within the
/// controller's grace period, all sandboxes are ended, unless the controller is leaving them, and
/// this returns.
///
/// # Errors
/// If the listener fails.
pub async fn serve<N: NodeApi>(
    listener: TcpListener,
    controller: Controller<N>,
    attach: Option<Client>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    // Head and body of an answer are two segments; Nagle's algorithm and delayed acknowledgements
    // would make that 40 ms.
    let listener = listener.tap_io(|stream| {
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!(error = %e, "TCP_NODELAY");
        }
    });
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(controller.clone(), attach))
        .with_graceful_shutdown(async move {
            let _ = stopped.await;
        })
        .into_future();
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return result,
        () = shutdown => {}
        () = controller.shutdown_requested() => {}
    }
    let _ = stop.send(());
    let winding_down = controller.shutdown();
    tokio::pin!(winding_down);
    tokio::select! {
        // All connections have ended; sandboxes may not have.
        result = &mut server => {
            winding_down.await;
            return result;
        }
        () = &mut winding_down => {}
    }
    tokio::time::timeout(LINGER, server).await.unwrap_or(Ok(()))
}
