//! What is answered. Pure.

use api_spec::error::ErrorBody;

/// What a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// A JSON document.
    Json,
    /// Text as Prometheus reads it.
    Text,
}

impl ContentType {
    /// As the header says it.
    pub fn as_str(self) -> &'static str {
        match self {
            ContentType::Json => "application/json",
            ContentType::Text => api_spec::prometheus::CONTENT_TYPE,
        }
    }
}

/// An answer: a status and a body, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// What the body is, if there is one.
    pub content_type: ContentType,
    /// Headers beyond those that every answer has.
    pub headers: Vec<(&'static str, String)>,
    /// The body; empty with status 204.
    pub body: Vec<u8>,
}

impl Response {
    fn new(status: u16, content_type: ContentType, body: Vec<u8>) -> Self {
        Response { status, content_type, headers: Vec::new(), body }
    }

    /// 204: done, nothing to say.
    pub fn done() -> Self {
        Response::new(204, ContentType::Json, Vec::new())
    }

    /// 200 with a document.
    pub fn document(document: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(document) {
            Ok(mut body) => {
                body.push(b'\n');
                Response::new(200, ContentType::Json, body)
            }
            Err(e) => Response::fault(500, &format!("cannot encode the answer: {e}")),
        }
    }

    /// 200 with text.
    pub fn text(text: String) -> Self {
        Response::new(200, ContentType::Text, text.into_bytes())
    }

    /// An error with its message.
    pub fn fault(status: u16, message: &str) -> Self {
        Response::refusal(status, &ErrorBody { fault_message: message.to_owned(), config: None })
    }

    /// An error.
    pub fn refusal(status: u16, error: &ErrorBody) -> Self {
        Response::new(status, ContentType::Json, serde_json::to_vec(error).unwrap_or_default())
    }

    /// With a header more. What would end its line is left out of the value.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        let mut value = value.into();
        value.retain(|c| !c.is_control());
        self.headers.push((name, value));
        self
    }
}
