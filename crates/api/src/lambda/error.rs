//! Errors in AWS's shape: `{"Type":…,"Message":…}` and the header that the SDKs key on.

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use medes_controller::{CodeError, DeployError, InvokeError};
use medes_core::FunctionName;
use serde_json::json;

use super::name::arn;

/// An error answer.
#[derive(Debug)]
pub(super) struct LambdaError {
    status: StatusCode,
    kind: &'static str,
    message: String,
}

impl LambdaError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into() }
    }

    /// A parameter that this platform can't do anything with.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidParameterValueException", message)
    }

    /// A parameter outside of its range.
    pub(super) fn validation(value: &str, field: &str, constraint: &str) -> Self {
        let message = format!(
            "1 validation error detected: Value '{value}' at '{field}' failed to satisfy \
             constraint: {constraint}"
        );
        Self::new(StatusCode::BAD_REQUEST, "ValidationException", message)
    }

    /// A body that is not what it should be.
    pub(super) fn serialization(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "SerializationException", message)
    }

    /// A payload that is not JSON, or a header that can't be understood.
    pub(super) fn request_content(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidRequestContentException", message)
    }

    pub(super) fn too_large(kind: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, kind, message)
    }

    pub(super) fn not_found(name: &str) -> Self {
        let message = format!("Function not found: {}", arn(name));
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", message)
    }

    pub(super) fn throttled(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequestsException", message)
    }

    pub(super) fn stale() -> Self {
        let message = "The Revision Id provided does not match the latest Revision Id. Call the \
            GetFunction/GetAlias API to retrieve the latest Revision Id";
        Self::new(StatusCode::PRECONDITION_FAILED, "PreconditionFailedException", message)
    }

    pub(super) fn unknown_operation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "UnknownOperationException", message)
    }

    fn service(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "ServiceException", message)
    }

    pub(super) fn from_invoke(e: &InvokeError, name: &FunctionName, max_payload: usize) -> Self {
        match e {
            InvokeError::NoSuchFunction(_) => Self::not_found(name.as_str()),
            InvokeError::PayloadTooLarge { .. } => Self::payload_too_large(max_payload),
            InvokeError::QueueFull { .. } | InvokeError::QueueTimeout { .. } => {
                Self::throttled(format!("Rate Exceeded. {e}"))
            }
            InvokeError::NoRuntime(why) => {
                Self::new(StatusCode::BAD_GATEWAY, "InvalidRuntimeException", why.clone())
            }
            InvokeError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceException", e.to_string())
            }
            InvokeError::Sandbox(_) | InvokeError::Internal(_) => Self::service(e.to_string()),
        }
    }

    pub(super) fn payload_too_large(limit: usize) -> Self {
        let message =
            format!("Request must be smaller than {limit} bytes for the InvokeFunction operation");
        Self::too_large("RequestTooLargeException", message)
    }
}

impl From<DeployError> for LambdaError {
    fn from(e: DeployError) -> Self {
        match e {
            DeployError::NoSuchFunction(name) => Self::not_found(name.as_str()),
            DeployError::Exists(name) => {
                let message = format!("Function already exist: {name}");
                Self::new(StatusCode::CONFLICT, "ResourceConflictException", message)
            }
            DeployError::StaleRevision(_) => Self::stale(),
            DeployError::NoRuntime { wanted, installed } => Self::invalid(format!(
                "Value {wanted} at 'runtime' failed to satisfy constraint: Member must satisfy \
                 enum value set: [{}] or be a valid ARN",
                installed.join(", ")
            )),
            DeployError::Code(CodeError::TooLarge { limit }) => {
                Self::invalid(format!("Unzipped size must be smaller than {limit} bytes"))
            }
            DeployError::Code(CodeError::Io { .. }) | DeployError::Store(_) => {
                Self::service(e.to_string())
            }
            DeployError::Code(e) => Self::invalid(format!(
                "Could not unzip uploaded file. Please check your file, then try to upload \
                 again. ({e})"
            )),
            DeployError::Invalid { .. } => Self::invalid(e.to_string()),
            DeployError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceException", e.to_string())
            }
        }
    }
}

impl IntoResponse for LambdaError {
    fn into_response(self) -> Response {
        let whose = if self.status.is_server_error() { "Service" } else { "User" };
        let body = Json(json!({ "Type": whose, "Message": self.message }));
        let mut response = (self.status, body).into_response();
        response.headers_mut().insert(
            HeaderName::from_static("x-amzn-errortype"),
            HeaderValue::from_static(self.kind),
        );
        response
    }
}
