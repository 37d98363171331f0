//! AWS Lambda's service API, as much as unmodified clients need to deploy and invoke functions.
//!
//! Signatures (`SigV4`) are not checked: the front door has no authentication of its own either.
//! What would change what a function sees, and does not exist here, is refused by name; what only
//! concerns AWS's own services (tracing, dead-letter queues, key management) is accepted and has no
//! effect.

mod configuration;
mod error;
mod functions;
mod invoke;
mod log_tail;
mod name;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post, put};
use medes_controller::Controller;
use medes_core::RequestId;
use medes_node::NodeApi;
use tokio::sync::Semaphore;

use error::LambdaError;

const REQUEST_ID: &str = "x-amzn-requestid";

/// The operations that there are.
const OPERATIONS: &str = "CreateFunction, GetFunction, GetFunctionConfiguration, ListFunctions, \
    UpdateFunctionCode, UpdateFunctionConfiguration, DeleteFunction and Invoke";

/// How many asynchronous (Event) requests may wait or run at once.
const MAX_EVENTS: usize = 1000;

/// What every handler gets.
struct Api<N: NodeApi> {
    controller: Controller<N>,
    /// Places for asynchronous requests.
    events: Arc<Semaphore>,
}

impl<N: NodeApi> Clone for Api<N> {
    fn clone(&self) -> Self {
        Self { controller: self.controller.clone(), events: self.events.clone() }
    }
}

pub(crate) fn routes<N: NodeApi>(controller: Controller<N>) -> Router {
    let function = get(functions::get::<N>).delete(functions::delete::<N>);
    let configuration =
        get(functions::get_configuration::<N>).put(functions::update_configuration::<N>);
    let mut router = Router::new();
    for (path, methods) in [
        ("", get(functions::list::<N>).post(functions::create::<N>)),
        ("/{name}", function),
        ("/{name}/configuration", configuration),
        ("/{name}/code", put(functions::update_code::<N>)),
        ("/{name}/invocations", post(invoke::invoke::<N>)),
    ] {
        // Old SDKs end some paths with a slash.
        let path = format!("/2015-03-31/functions{path}");
        let methods: MethodRouter<Api<N>> = methods;
        router = router.route(&format!("{path}/"), methods.clone()).route(&path, methods);
    }
    let api = Api { controller, events: Arc::new(Semaphore::new(MAX_EVENTS)) };
    router.layer(axum::middleware::from_fn(add_request_id)).with_state(api)
}

/// Whether a path looks like one of Lambda's: it begins with a date.
pub(crate) fn is_lambda_path(path: &str) -> bool {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or("");
    let shape: Vec<usize> = first.split('-').map(str::len).collect();
    shape == [4, 2, 2] && first.bytes().all(|b| b.is_ascii_digit() || b == b'-')
}

pub(crate) fn unknown_operation(method: &Method, path: &str) -> Response {
    let message = format!("there is no operation {method} {path} here; there are {OPERATIONS}");
    LambdaError::unknown_operation(message).into_response()
}

/// Every answer names its request, as AWS's do.
async fn add_request_id(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if !response.headers().contains_key(REQUEST_ID)
        && let Ok(value) = HeaderValue::try_from(RequestId::random().to_string())
    {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_lambda_begin_with_a_date() {
        assert!(is_lambda_path("/2015-03-31/functions/x/aliases"));
        assert!(is_lambda_path("/2021-11-15/functions"));
        assert!(!is_lambda_path("/v1/functions"));
        assert!(!is_lambda_path("/2015/03/31"));
        assert!(!is_lambda_path("/"));
    }
}
