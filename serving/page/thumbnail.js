// A small copy of the picture for its card. Decoded one after the other: fifty photographs of
// 12 megapixels are 2.4 GB if the browser opens them together, and 48 MB one at a time.

const LONGER_SIDE = 640;
let before = Promise.resolve();

/** Resolves to an `img`, or null where the browser cannot show the file. */
export function thumbnail(file, alt) {
  const made = before.then(() => draw(file, alt)).catch(() => null);
  before = made;
  return made;
}

async function draw(file, alt) {
  const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
  const scale = Math.min(1, LONGER_SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * picture.width));
  canvas.height = Math.max(1, Math.round(scale * picture.height));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // transparency is shown on white, as the server does
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85));
  return shown(blob, alt);
}

async function shown(blob, alt) {
  const image = new Image();
  image.className = "picture";
  image.alt = alt;
  const address = URL.createObjectURL(blob);
  image.src = address;
  try {
    await image.decode();
  } finally {
    URL.revokeObjectURL(address);
  }
  return image;
}
