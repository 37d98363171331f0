//! The policy over idle sandboxes: what is in force, its change, and why it decides as it does.

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use medes_controller::{Controller, HandError};
use medes_node::NodeApi;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::native::{function_name, json_body};

/// The longest body of a change, bytes.
const LONGEST: usize = 64 << 10;

type Answer = Result<Response, ApiError>;

/// `/v1/policy`.
pub(crate) fn of_all<N: NodeApi>() -> MethodRouter<Controller<N>> {
    get(show::<N>).put(set::<N>).delete(reset::<N>)
}

/// `/v1/functions/{name}/policy`.
pub(crate) fn of_one<N: NodeApi>() -> MethodRouter<Controller<N>> {
    get(explain::<N>).put(set_for::<N>).delete(reset_for::<N>)
}

/// `current` with the keys of `change` in place of its own; only keys that it has.
pub(crate) fn changed<T: Serialize + DeserializeOwned>(
    current: &T,
    change: Map<String, Value>,
) -> Result<T, ApiError> {
    let bad = |e: &dyn std::fmt::Display| ApiError::bad_request(format!("policy: {e}"));
    let mut all = serde_json::to_value(current).map_err(|e| bad(&e))?;
    for (key, value) in change {
        let known: Vec<_> = all.as_object().into_iter().flat_map(Map::keys).cloned().collect();
        match all.get_mut(&key) {
            Some(place) => *place = value,
            None => return Err(bad(&format!("no {key:?}; there are {}", known.join(", ")))),
        }
    }
    serde_json::from_value(all).map_err(|e| bad(&e))
}

async fn show<N: NodeApi>(State(controller): State<Controller<N>>) -> Response {
    Json(controller.policy()).into_response()
}

async fn set<N: NodeApi>(State(controller): State<Controller<N>>, request: Request) -> Answer {
    let change = json_body(request, LONGEST).await?;
    let settings = changed(&controller.policy().policy, change)?;
    controller.set_policy(Some(settings)).await?;
    Ok(show(State(controller)).await)
}

async fn reset<N: NodeApi>(State(controller): State<Controller<N>>) -> Answer {
    controller.set_policy(None).await?;
    Ok(show(State(controller)).await)
}

async fn explain<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    Ok(Json(controller.explain(&function_name(&name)?)?).into_response())
}

async fn set_for<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
    request: Request,
) -> Answer {
    let name = function_name(&name)?;
    let change = json_body(request, LONGEST).await?;
    let current = controller
        .function_settings(&name)
        .ok_or_else(|| HandError::NoSuchFunction(name.clone()))?;
    let settings = changed(&current, change)?;
    controller.set_function_policy(&name, settings).await?;
    Ok(Json(json!({ "function": name, "settings": settings })).into_response())
}

async fn reset_for<N: NodeApi>(
    State(controller): State<Controller<N>>,
    Path(name): Path<String>,
) -> Answer {
    let name = function_name(&name)?;
    controller.set_function_policy(&name, Default::default()).await?;
    Ok(Json(json!({ "function": name, "settings": {} })).into_response())
}
