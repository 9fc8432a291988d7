"""The words of the text questions."""

from __future__ import annotations


WORDS = [
    "apple",
    "bread",
    "cloud",
    "dance",
    "eagle",
    "flame",
    "grape",
    "house",
    "island",
    "jacket",
    "kite",
    "lemon",
    "music",
    "night",
    "ocean",
    "paper",
    "queen",
    "river",
    "stone",
    "table",
    "umbrella",
    "violin",
    "water",
    "yard",
]
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Lena",
    "Mark",
    "Nina",
    "Oscar",
    "Paula",
    "Tom",
]
ANIMALS = ["cat", "dog", "horse", "rabbit", "fox", "owl", "bear", "mouse", "duck", "goat"]
SETTINGS = ["forest", "lake", "mountain", "garden", "beach", "castle", "farm", "village", "desert", "market"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DISHES = ["soup", "salad", "sandwich", "cake", "pie", "stew"]
INGREDIENTS = ["carrots", "tomatoes", "apples", "onions", "potatoes", "cheese", "mushrooms", "beans", "eggs", "nuts"]

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
