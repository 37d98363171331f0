//! Errors of the native API: a status, a stable code for programs, a message for people.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use medes_controller::{CodeError, DeployError, HandError, InvokeError};
use serde_json::json;

/// An error as the native API shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// A stable name, such as `NoSuchFunction`.
    pub code: &'static str,
    /// What went wrong, and the way out.
    pub message: String,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl ToString) -> Self {
        Self { status, code, message: message.to_string() }
    }

    pub(crate) fn bad_request(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(crate) fn body(&self) -> serde_json::Value {
        json!({ "code": self.code, "message": self.message })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.body() }))).into_response()
    }
}

impl From<InvokeError> for ApiError {
    fn from(error: InvokeError) -> Self {
        let (status, code) = match &error {
            InvokeError::NoSuchFunction(_) => (StatusCode::NOT_FOUND, "NoSuchFunction"),
            InvokeError::PayloadTooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, "PayloadTooLarge")
            }
            InvokeError::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, "QueueFull"),
            InvokeError::QueueTimeout { .. } => (StatusCode::SERVICE_UNAVAILABLE, "QueueTimeout"),
            InvokeError::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "ShuttingDown"),
            InvokeError::NoRuntime(_) => (StatusCode::CONFLICT, "NoRuntime"),
            InvokeError::Sandbox(_) => (StatusCode::INTERNAL_SERVER_ERROR, "Sandbox"),
            InvokeError::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "Internal"),
        };
        Self::new(status, code, error)
    }
}

impl From<HandError> for ApiError {
    fn from(error: HandError) -> Self {
        let (status, code) = match &error {
            HandError::NoSuchSandbox(_) => (StatusCode::NOT_FOUND, "NoSuchSandbox"),
            HandError::NoSuchFunction(_) => (StatusCode::NOT_FOUND, "NoSuchFunction"),
            HandError::NotStarted { .. } => (StatusCode::CONFLICT, "NotStarted"),
            HandError::WrongState { .. } => (StatusCode::CONFLICT, "WrongState"),
            HandError::StaysWarm { .. } => (StatusCode::CONFLICT, "StaysWarm"),
            HandError::Cancelled(_) => (StatusCode::CONFLICT, "Cancelled"),
            HandError::Lost { .. } => (StatusCode::CONFLICT, "Lost"),
        };
        Self::new(status, code, error)
    }
}

impl From<DeployError> for ApiError {
    fn from(error: DeployError) -> Self {
        let (status, code) = match &error {
            DeployError::NoSuchFunction(_) => (StatusCode::NOT_FOUND, "NoSuchFunction"),
            DeployError::Exists(_) => (StatusCode::CONFLICT, "Exists"),
            DeployError::StaleRevision(_) => (StatusCode::PRECONDITION_FAILED, "StaleRevision"),
            DeployError::Invalid { .. } => (StatusCode::BAD_REQUEST, "Invalid"),
            DeployError::NoRuntime { .. } => (StatusCode::BAD_REQUEST, "NoRuntime"),
            DeployError::Code(CodeError::ArchiveTooLarge { .. } | CodeError::TooLarge { .. }) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "CodeTooLarge")
            }
            DeployError::Code(CodeError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                (StatusCode::INSUFFICIENT_STORAGE, "DiskFull")
            }
            DeployError::Code(_) => (StatusCode::BAD_REQUEST, "BadCode"),
            DeployError::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "Store"),
            DeployError::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "ShuttingDown"),
        };
        Self::new(status, code, error)
    }
}
