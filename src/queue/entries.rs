//! The argument of queue_send_entries: a JSON array of objects with queue_send's argument names. Owns how it is read
//! and nothing else: no Postgres, no queue, no limit but the one it is given.

use serde::de::{Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::fmt;

/// One element. The message stays the text it is: numbers keep every digit.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry<'a> {
    /// The message, any JSON but null.
    #[serde(borrow)]
    pub message: &'a RawValue,
    /// The headers, any JSON.
    #[serde(borrow, default)]
    pub headers: Option<&'a RawValue>,
    /// An interval, as text.
    #[serde(default)]
    pub delay: Option<String>,
    /// A time, as text.
    #[serde(default)]
    pub deliver_at: Option<String>,
    /// Not built.
    #[serde(default)]
    pub priority: Option<i64>,
    /// Not built.
    #[serde(default)]
    pub group_key: Option<String>,
    /// Not built.
    #[serde(default)]
    pub dedup_key: Option<String>,
    /// An interval, as text.
    #[serde(default)]
    pub ttl: Option<String>,
}

/// What is wrong with the argument as a whole.
#[derive(Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is something else than an array.
    NoArray,
    /// It has so many elements, more than were allowed.
    TooMany(usize),
}

/// The elements, each as its text, if there are at most `most`; more are counted and not kept, for millions of them
/// take little place in the text and much here.
pub fn elements(text: &str, most: usize) -> Result<Vec<&RawValue>, Problem> {
    struct Elements(usize);

    impl<'de> Visitor<'de> for Elements {
        type Value = Result<Vec<&'de RawValue>, usize>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a JSON array")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
            let mut kept = Vec::new();
            while kept.len() < self.0 {
                let Some(element) = array.next_element()? else { return Ok(Ok(kept)) };
                kept.try_reserve(1).map_err(A::Error::custom)?;
                kept.push(element);
            }
            let mut count = kept.len();
            while array.next_element::<IgnoredAny>()?.is_some() {
                count += 1;
            }
            Ok(if count > self.0 { Err(count) } else { Ok(kept) })
        }
    }

    let mut reader = serde_json::Deserializer::from_str(text);
    let elements = reader.deserialize_seq(Elements(most)).map_err(|_| Problem::NoArray)?;
    reader.end().map_err(|_| Problem::NoArray)?;
    elements.map_err(Problem::TooMany)
}

/// Reads one element. `Err`: what is wrong with it.
pub fn entry(element: &RawValue) -> Result<Entry<'_>, String> {
    // A struct may be read from an array, too.
    if !element.get().starts_with('{') {
        return Err("it is not an object".into());
    }
    serde_json::from_str(element.get()).map_err(|error| error.to_string())
}
