//! What must hold of any text that is given as entries. For the replay of the corpus and for the fuzz target.

use crate::entries::{elements, entry, Problem};

const MOST: usize = 16;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let whole: Result<Vec<serde_json::Value>, _> = serde_json::from_str(text);
    match elements(text, MOST) {
        Ok(elements) => {
            if let Ok(whole) = &whole {
                assert_eq!(whole.len(), elements.len());
            }
            for element in elements {
                // Its text is a part of the text, to the letter.
                let within = element.get().as_ptr() as usize - text.as_ptr() as usize;
                assert_eq!(&text[within..within + element.get().len()], element.get());
                if let Ok(entry) = entry(element) {
                    assert!(element.get().contains(entry.message.get()), "the message as it was given");
                    assert!(entry.headers.is_none_or(|headers| element.get().contains(headers.get())));
                }
            }
        }
        Err(Problem::TooMany(count)) => {
            assert!(count > MOST);
            if let Ok(whole) = &whole {
                assert_eq!(whole.len(), count);
            }
        }
        Err(Problem::NoArray) => assert!(whole.is_err(), "an array was not taken for one"),
    }
}
